// Command prog is run inside the guests of the boot tests.
package main

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strconv"
	"syscall"
	"time"
)

func main() {
	switch os.Args[1] {
	case "about": // who and where am I
		groups, _ := os.Getgroups()
		cwd, _ := os.Getwd()
		var l syscall.Rlimit
		_ = syscall.Getrlimit(syscall.RLIMIT_FSIZE, &l)
		out := map[string]any{
			"args": os.Args[2:], "env": os.Environ(), "cwd": cwd, "uid": os.Getuid(), "gid": os.Getgid(),
			"groups": groups, "fsize": l.Cur, "pgrp": syscall.Getpgrp() == os.Getpid(),
		}
		_ = json.NewEncoder(os.Stdout).Encode(out)
	case "cat":
		n, err := io.Copy(os.Stdout, os.Stdin)
		fmt.Fprintln(os.Stderr, n, err)
	case "spew": // N MiB to stdout, a mark to stderr
		n, _ := strconv.Atoi(os.Args[2])
		block := make([]byte, 1<<20)
		for i := range block {
			block[i] = byte(i * 7)
		}
		for range n {
			if _, err := os.Stdout.Write(block); err != nil {
				os.Exit(9)
			}
		}
		fmt.Fprint(os.Stderr, "all written")
	case "exit":
		n, _ := strconv.Atoi(os.Args[2])
		os.Exit(n)
	case "sleep":
		fmt.Println("sleeping")
		time.Sleep(time.Hour)
	case "stubborn": // does not end when asked to
		signal.Ignore(syscall.SIGTERM)
		fmt.Println("staying")
		time.Sleep(time.Hour)
	case "leave": // leaves a process behind that goes on writing
		attr := &syscall.ProcAttr{Files: []uintptr{0, 1, 2}}
		if _, err := syscall.ForkExec("/proc/self/exe", []string{"prog", "chatter"}, attr); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		fmt.Println("left")
	case "chatter":
		for i := 0; ; i++ {
			if _, err := fmt.Println("still here"); err != nil {
				_ = os.WriteFile("/tmp/chatter-died", nil, 0o644)
				os.Exit(1)
			}
			_ = os.WriteFile("/tmp/chatter", []byte(strconv.Itoa(i)), 0o644)
			time.Sleep(10 * time.Millisecond)
		}
	case "userns": // namespaces as sandboxes inside the sandbox use them
		attr := &syscall.ProcAttr{
			Files: []uintptr{0, 1, 2},
			Sys:   &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWUSER | syscall.CLONE_NEWNS},
		}
		if _, err := syscall.ForkExec("/proc/self/exe", []string{"prog", "exit", "0"}, attr); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	}
}
