"""vLLM: its rules, its own loader, its engine; the last two in a child process of its environment."""
