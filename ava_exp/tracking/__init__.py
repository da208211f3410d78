"""What a run leaves behind: its folder, logs, metrics, trackers, live view, figures and report."""
