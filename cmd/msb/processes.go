package main

// processes are the programs that msb starts itself as: each is reached by its
// name as the first argument, before any command is parsed, and returns the
// exit code of the process.
var processes = map[string]func(args []string) int{}
