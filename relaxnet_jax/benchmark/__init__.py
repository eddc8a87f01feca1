"""What it costs: speed, memory and scaling, and the same beside other programs."""
