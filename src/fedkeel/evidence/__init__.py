"""What runs say: suites of many runs, measures of a finished one, reports."""
