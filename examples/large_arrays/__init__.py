"""One array sent as a list, in base64 and by reference: what each costs."""
