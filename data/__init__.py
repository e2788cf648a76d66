"""A package, so that `import data.loader` never finds an installed package called data."""
