module u2moe // where it is published: the address of that repository, with /examples/c/go

go 1.21
