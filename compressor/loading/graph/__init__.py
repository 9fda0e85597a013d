"""What foreign model files are read with: nothing here executes what a file holds."""
