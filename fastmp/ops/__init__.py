"""The operations: schema, checks, reference in plain PyTorch and public function, one file each."""
