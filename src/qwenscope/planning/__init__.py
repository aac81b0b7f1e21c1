"""What a recipe needs and how long it takes, before anyone rents a machine."""
