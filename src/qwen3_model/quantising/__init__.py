"""`orthrus quantize`: numbers to codes, the forms that they are stored in, a folder of them, its report."""
