"""What a model's folder says of itself without torch: headers, layer names, families."""
