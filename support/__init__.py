"""What nobody types or edits; readme.md lists what is here."""
