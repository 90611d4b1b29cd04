"""Small bugs planted into the package one by one: a test must fail for each."""
