"""What measures us, and beside us what others would use. Every figure comes from one run on one machine."""
