"""What ops take and give: one declaration for every backend."""
