"""State that survives kills: versioned objects in files, and the manifest that names the committed ones."""
