"""What gists keep of the answers that text gives, and how long either takes."""
