package main

import (
	"fmt"
	"os"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox/cmd/msb/fetchbin"
)

// fetchMain becomes msb-fetch. It returns only when it could not.
func fetchMain(args []string) int {
	if err := becomeFetch(args); err != nil {
		fmt.Fprintln(os.Stderr, "msb-fetch:", err)
	}
	return exitFailure
}

// becomeFetch executes the embedded program from memory: there may be no
// directory in which it could be written and executed.
func becomeFetch(args []string) error {
	program := fetchbin.Bytes()
	if program == nil {
		return fmt.Errorf("msb was built without it: build it with make build")
	}
	fd, err := unix.MemfdCreate("msb-fetch", unix.MFD_CLOEXEC|unix.MFD_EXEC)
	if err == unix.EINVAL { // before Linux 6.3
		fd, err = unix.MemfdCreate("msb-fetch", unix.MFD_CLOEXEC)
	}
	if err != nil {
		return os.NewSyscallError("memfd_create", err)
	}
	if _, err := os.NewFile(uintptr(fd), "msb-fetch").Write(program); err != nil {
		return err
	}
	argv, err := syscall.SlicePtrFromStrings(append([]string{"msb-fetch"}, args...))
	if err != nil {
		return err
	}
	envv, err := syscall.SlicePtrFromStrings(os.Environ())
	if err != nil {
		return err
	}
	var empty byte // the program is the descriptor itself, not a path below it
	_, _, errno := unix.RawSyscall6(unix.SYS_EXECVEAT, uintptr(fd), uintptr(unsafe.Pointer(&empty)),
		uintptr(unsafe.Pointer(&argv[0])), uintptr(unsafe.Pointer(&envv[0])), unix.AT_EMPTY_PATH, 0)
	return os.NewSyscallError("execveat", errno)
}
