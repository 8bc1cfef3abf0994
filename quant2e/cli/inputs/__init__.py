"""What the command line reads: models, data, and functions of the user's, which alone are run."""
