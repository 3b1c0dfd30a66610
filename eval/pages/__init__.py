"""What a person looks at: report pages, charts, tables of numbers."""
