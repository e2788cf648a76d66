"""A package, so that `import data.loader` finds this folder before any installed package called data."""
