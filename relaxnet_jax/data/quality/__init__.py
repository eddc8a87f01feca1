"""What is in a set, and which of its relaxations make no physical sense."""
