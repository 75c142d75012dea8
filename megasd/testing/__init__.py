"""What tests of this project, and of code built on it, need: spawned ranks, tiny models."""
