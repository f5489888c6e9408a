"""What to run: functions that return a Run; values, no logic."""
