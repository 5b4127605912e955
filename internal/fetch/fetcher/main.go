package fetcher

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox/internal/fetch"
)

// Main is msb-fetch; it returns the exit code.
func Main(args []string) int {
	var err error
	switch {
	case len(args) == 2 && args[0] == fetch.ModeDecompress:
		err = decompress(fetch.Codec(args[1]))
	case len(args) == 1 && args[0] == fetch.ModeRegistry:
		err = serve()
	default:
		err = errors.New("msb-fetch is started by msb")
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

func decompress(c fetch.Codec) error {
	r, err := InProcess{}.Decompress(context.Background(), c, os.Stdin)
	if err != nil {
		return err
	}
	_, err = io.CopyBuffer(onlyWriter{os.Stdout}, r, make([]byte, 256<<10))
	return err
}

// onlyWriter keeps io.CopyBuffer to its buffer.
type onlyWriter struct{ io.Writer }

// serve answers requests until standard input, or their socket, is closed.
func serve() error {
	in := bufio.NewReader(io.LimitReader(os.Stdin, fetch.MaxAccess))
	line, err := in.ReadBytes('\n')
	if err != nil {
		return err
	}
	var a fetch.Access
	if err := json.Unmarshal(line, &a); err != nil {
		return err
	}
	go func() {
		_, _ = in.WriteTo(io.Discard)
		os.Exit(0) // nobody wants an answer any more
	}()
	dial := sync.OnceValues(func() (fetch.Registry, error) { return InProcess{}.Dial(context.Background(), a) })
	for {
		q, pipe, err := receive()
		if err != nil || pipe == nil {
			return err
		}
		go func() {
			defer pipe.Close()
			reg, err := dial()
			var resp *fetch.Response
			if err == nil {
				resp, err = reg.Get(context.Background(), *q)
			}
			_ = fetch.WriteAnswer(pipe, resp, err) // else nobody reads it any more
		}()
	}
}

// receive reads a request with its pipe; pipe is nil at the end.
func receive() (*fetch.Request, *os.File, error) {
	buf, oob := make([]byte, fetch.MaxPacket), make([]byte, unix.CmsgSpace(4))
	n, oobn, _, _, err := unix.Recvmsg(fetch.RequestFD, buf, oob, unix.MSG_CMSG_CLOEXEC)
	if err != nil {
		return nil, nil, os.NewSyscallError("recvmsg", err)
	}
	if n == 0 {
		return nil, nil, nil
	}
	msgs, err := unix.ParseSocketControlMessage(oob[:oobn])
	if err != nil || len(msgs) != 1 {
		return nil, nil, errors.New("request without a pipe")
	}
	fds, err := unix.ParseUnixRights(&msgs[0])
	if err != nil || len(fds) != 1 {
		return nil, nil, errors.New("request without a pipe")
	}
	pipe := os.NewFile(uintptr(fds[0]), "answer")
	var q fetch.Request
	if err := json.Unmarshal(buf[:n], &q); err != nil {
		return nil, nil, err
	}
	return &q, pipe, nil
}
