"""Statistics of a data set, and checks for relaxations that make no physical sense."""
