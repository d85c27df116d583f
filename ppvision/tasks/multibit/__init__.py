"""Several bit-widths of one configured job."""
