"""Speed and memory beside a plain reference, and that reference."""
