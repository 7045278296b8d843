"""What a finished run is measured by beside its scores."""
