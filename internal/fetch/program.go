package fetch

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// Process is the name by which msb starts as msb-fetch.
const Process = "fetch"

// Modes of msb-fetch, its first argument.
const (
	ModeDecompress = "decompress" // CODEC; standard input to standard output
	ModeRegistry   = "registry"
)

// Program is [Tools] by processes of msb. Find returns the path of msb.
type Program struct {
	Find func() (string, error)
}

func (p Program) command(ctx context.Context, args ...string) (*exec.Cmd, *bytes.Buffer, error) {
	msb, err := p.Find()
	if err != nil {
		return nil, nil, err
	}
	cmd := exec.CommandContext(ctx, msb, append([]string{Process}, args...)...)
	stderr := new(bytes.Buffer)
	cmd.Stderr = stderr
	return cmd, stderr, nil
}

// Decompress implements [Tools].
func (p Program) Decompress(ctx context.Context, c Codec, r io.Reader) (io.ReadCloser, error) {
	ctx, cancel := context.WithCancel(ctx)
	cmd, stderr, err := p.command(ctx, ModeDecompress, string(c))
	if err != nil {
		cancel()
		return nil, err
	}
	cmd.Stdin = r
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		cancel()
		return nil, err
	}
	return &filter{ctx: ctx, cancel: cancel, cmd: cmd, out: out, stderr: stderr}, nil
}

// filter is the output of a process; its end is the end of the process.
type filter struct {
	ctx    context.Context
	cancel context.CancelFunc
	cmd    *exec.Cmd
	out    io.Reader
	stderr *bytes.Buffer
	err    error // set once the process was waited for
}

func (f *filter) Read(b []byte) (int, error) {
	if f.err != nil {
		return 0, f.err
	}
	n, err := f.out.Read(b)
	if err != nil {
		f.err = err
		if werr := f.cmd.Wait(); werr != nil {
			f.err = failure(f.ctx, werr, f.stderr)
		}
		err = f.err
	}
	return n, err
}

func (f *filter) Close() error {
	f.cancel()
	if f.err == nil {
		f.err = os.ErrClosed
		_ = f.cmd.Wait() // killed by the end of its context
	}
	return nil
}

// failure is how a process ended, in its own words.
func failure(ctx context.Context, err error, stderr *bytes.Buffer) error {
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if said := strings.TrimSpace(stderr.String()); said != "" {
		return errors.New(said)
	}
	return fmt.Errorf("msb-fetch: %w", err)
}

// Dial implements [Tools].
func (p Program) Dial(ctx context.Context, a Access) (Registry, error) {
	line, err := json.Marshal(a)
	if err != nil {
		return nil, err
	}
	if len(line) >= MaxAccess {
		return nil, &Error{Stage: "certificates", Message: "certificate authorities of more than 3 MiB"}
	}
	ctx, cancel := context.WithCancel(ctx)
	cmd, stderr, err := p.command(ctx, ModeRegistry)
	if err != nil {
		cancel()
		return nil, err
	}
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		cancel()
		return nil, os.NewSyscallError("socketpair", err)
	}
	requests, theirs := os.NewFile(uintptr(pair[0]), "requests"), os.NewFile(uintptr(pair[1]), "requests")
	defer theirs.Close()
	cmd.ExtraFiles = []*os.File{theirs} // RequestFD
	stdin, err := cmd.StdinPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err == nil {
		_, err = stdin.Write(append(line, '\n'))
	}
	c := &client{ctx: ctx, cancel: cancel, cmd: cmd, stdin: stdin, stderr: stderr, requests: requests}
	if err != nil {
		c.Close()
		return nil, err
	}
	return c, nil
}

// client is a [Registry] by a process.
type client struct {
	ctx    context.Context
	cancel context.CancelFunc
	cmd    *exec.Cmd
	stdin  io.Closer // open as long as the process is wanted
	stderr *bytes.Buffer

	mu       sync.Mutex // guards requests
	requests *os.File
}

func (c *client) Get(ctx context.Context, r Request) (*Response, error) {
	packet, err := json.Marshal(r)
	if err != nil {
		return nil, err
	}
	if len(packet) > MaxPacket {
		return nil, fmt.Errorf("request of %d bytes", len(packet))
	}
	pr, pw, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	err = c.send(packet, pw)
	pw.Close()
	if err != nil {
		pr.Close()
		return nil, c.gone(err)
	}
	stop := context.AfterFunc(ctx, func() { pr.Close() })
	resp, err := ReadAnswer(pr)
	if err != nil {
		stop()
		pr.Close()
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		return nil, err
	}
	resp.Body = &cancelled{ctx, stop, resp.Body}
	return resp, nil
}

func (c *client) send(packet []byte, pw *os.File) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return unix.Sendmsg(int(c.requests.Fd()), packet, unix.UnixRights(int(pw.Fd())), nil, unix.MSG_NOSIGNAL)
}

// gone is err, or why the process has ended.
func (c *client) gone(err error) error {
	if c.ctx.Err() != nil {
		return c.ctx.Err()
	}
	return fmt.Errorf("msb-fetch: %w", err)
}

// Close ends the process.
func (c *client) Close() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.cancel()
	if c.stdin != nil {
		c.stdin.Close()
	}
	c.requests.Close()
	if c.cmd.Process != nil {
		_ = c.cmd.Wait()
	}
	return nil
}

// cancelled is a body that says why it ended before its end.
type cancelled struct {
	ctx  context.Context
	stop func() bool
	io.ReadCloser
}

func (c *cancelled) Read(p []byte) (int, error) {
	n, err := c.ReadCloser.Read(p)
	if err != nil && err != io.EOF && c.ctx.Err() != nil {
		err = c.ctx.Err()
	}
	return n, err
}

func (c *cancelled) Close() error {
	c.stop()
	return c.ReadCloser.Close()
}
