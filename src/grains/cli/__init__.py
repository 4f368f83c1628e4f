"""What the scripts share: flags, loading, error messages, the files of a stage."""
