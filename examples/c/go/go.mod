module github.com/u2moe/u2moe-go

go 1.21
