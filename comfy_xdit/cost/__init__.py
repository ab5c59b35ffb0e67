"""What a parallel spec costs: arithmetic, bytes sent, memory, and from these the best one."""
