"""How often judges err: against each other, against human labels, and what that makes of their rates."""
