"""The plugins that come with psnc: hook implementations, and nothing that another cannot do."""
