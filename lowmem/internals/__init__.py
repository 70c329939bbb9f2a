"""Every private name of other packages that is used, each behind a plainly named function."""
