"""Scores for generated images: the ADM suite, FD on other features, KID. README.md says which number is which."""
