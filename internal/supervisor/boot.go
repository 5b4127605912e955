package supervisor

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox/internal/agentproto"
	"github.com/microsandbox-go/microsandbox/internal/errdefs"
	"github.com/microsandbox-go/microsandbox/internal/version"
)

// socketPair returns two connected stream sockets, both close-on-exec. The
// first is ours and non-blocking, the second is for a child.
func socketPair(name string) (ours, theirs *os.File, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("socketpair for %s: %w", name, err)
	}
	if err := unix.SetNonblock(fds[0], true); err != nil {
		unix.Close(fds[0])
		unix.Close(fds[1])
		return nil, nil, err
	}
	return os.NewFile(uintptr(fds[0]), name), os.NewFile(uintptr(fds[1]), name+" (child)"), nil
}

// bootMessage is what the agent is told to set up.
func bootMessage(c *Config, mounts []agentproto.Mount) agentproto.Boot {
	seed := make([]byte, 64)
	_, _ = rand.Read(seed) // never fails (crypto/rand)
	b := agentproto.Boot{
		Hostname: c.Hostname, Mounts: mounts, Env: c.Env, Workdir: c.Workdir, User: c.User,
		Entropy: seed,
	}
	if c.RootFS != "" {
		b.Root = agentproto.Root{Lower: serialRoot, Fstype: "ext4"}
		if c.UpperMiB > 0 {
			b.Root.Upper = serialUpper
		}
	}
	return b
}

// handshake waits for the agent's hello, sends the boot message and waits for
// its answer. It returns the body of the ready frame, which clients get too, and
// whether the agent was heard at all.
func handshake(link io.ReadWriter, in *agentproto.LinkReader, boot agentproto.Boot) (ready []byte, heard bool, err error) {
	var hello agentproto.Hello
	if err := expect(in, agentproto.MsgHello, &hello); err != nil {
		return nil, false, err
	}
	if hello.Version != version.Version {
		return nil, true, fmt.Errorf("guest agent is version %q, msb is %q", hello.Version, version.Version)
	}
	boot.TimeNS = time.Now().UnixNano() // now: booting has taken its time
	body, err := agentproto.Encode(agentproto.MsgBoot, boot)
	if err != nil {
		return nil, true, err
	}
	if err := agentproto.NewWriter(link, agentproto.MaxFrame).WriteFrame(agentproto.Frame{Body: body}); err != nil {
		return nil, true, err
	}
	for {
		f, err := in.ReadFrame()
		if err != nil {
			return nil, true, fmt.Errorf("guest ended while it was setting up: %w", err)
		}
		msgType, _, payload, err := agentproto.Decode(f.Body)
		if err != nil {
			return nil, true, err
		}
		switch msgType {
		case agentproto.MsgReady:
			return f.Body, true, nil
		case agentproto.MsgBootFailed:
			var b agentproto.BootFailed
			if err := agentproto.Unmarshal(payload, &b); err != nil {
				return nil, true, err
			}
			return nil, true, bootFailed(b)
		}
	}
}

// bootFailed is the error of a guest that could not set itself up.
func bootFailed(b agentproto.BootFailed) error {
	e := errdefs.New(errdefs.InvalidConfig, "guest could not set up %s: %s", b.Step, b.Message)
	for _, errno := range []unix.Errno{unix.ENOTDIR, unix.EEXIST} { // of mkdir and mount
		if strings.HasSuffix(b.Message, errno.Error()) {
			return e.WithHint("the image has a file at this path, or above it: mount at another guest path, or use another image")
		}
	}
	return e
}

func expect(in *agentproto.LinkReader, want string, into any) error {
	f, err := in.ReadFrame()
	if err != nil {
		return fmt.Errorf("guest ended before its agent answered: %w", err)
	}
	msgType, _, payload, err := agentproto.Decode(f.Body)
	if err != nil {
		return err
	}
	if msgType != want {
		return fmt.Errorf("guest agent sent %q, want %q", msgType, want)
	}
	return agentproto.Unmarshal(payload, into)
}

// consoleTail returns the last lines of the serial console for an error message.
func consoleTail(path string) string {
	const most = 2048
	f, err := os.Open(path)
	if err != nil {
		return ""
	}
	defer f.Close()
	if fi, err := f.Stat(); err == nil && fi.Size() > most {
		_, _ = f.Seek(-most, io.SeekEnd)
	}
	b, _ := io.ReadAll(io.LimitReader(f, most))
	return printableText(b)
}

// printableText keeps what a terminal can show of untrusted bytes.
func printableText(b []byte) string {
	out := make([]rune, 0, len(b))
	for _, r := range string(b) {
		if r == '\n' || (r >= 0x20 && r != 0x7f && r != 0xfffd && (r < 0x80 || r > 0x9f)) {
			out = append(out, r)
		}
	}
	return string(out)
}

// bootError names what went wrong during a boot: the machine's end, the
// deadline or the agent's answer, with the end of the console where it helps.
func (s *supervisor) bootError(ctx context.Context, err error) error {
	var typed *errdefs.Error
	if errors.As(err, &typed) {
		return err
	}
	if errors.Is(ctx.Err(), context.Canceled) {
		return errdefs.Wrap(errdefs.Cancelled, ctx.Err(), "boot of sandbox %q", s.cfg.Name)
	}
	what := err.Error()
	switch {
	case ctx.Err() != nil:
		what = fmt.Sprintf("guest did not boot within %s", s.bootTimeout())
	case s.machineEnds(lifelineGrace): // the link ended because the machine did, mostly
		e := s.machine.Exit()
		what = "guest ended while booting"
		if e.Reason != "" {
			what += ": " + e.Reason
		}
		if e.Detail != "" {
			what += ": " + e.Detail
		}
	}
	e := errdefs.New(errdefs.Internal, "sandbox %q: %s", s.cfg.Name, what)
	if tail := consoleTail(s.logPath(ConsoleLog)); tail != "" {
		e.Msg += "; end of the console:\n" + tail
	}
	return e.WithHint("msb doctor shows kernel and accelerator; a slow machine may need a longer boot timeout (--boot-timeout)")
}

// machineEnds reports whether the machine is gone, or goes within the time.
func (s *supervisor) machineEnds(within time.Duration) bool {
	select {
	case <-s.machine.Done():
		return true
	case <-time.After(within):
		return false
	}
}
