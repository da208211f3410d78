"""Submission of runs to clusters and other machines; the only package that may import submitit."""
