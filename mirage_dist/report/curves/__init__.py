"""What is drawn as a curve or a frontier: success against draws, and forgetting against what is kept."""
