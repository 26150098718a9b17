"""What consumers get with a registered model."""
