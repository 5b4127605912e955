package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox/internal/agentproto"
	"github.com/microsandbox-go/microsandbox/internal/sandbox"
	"github.com/microsandbox-go/microsandbox/internal/vmm"
	"github.com/microsandbox-go/microsandbox/internal/vmm/qemu"
)

// patience bounds one boot of a machine that this program drives itself.
const patience = time.Minute

// guest is a QEMU started here: no supervisor, no confinement.
type guest struct {
	vmm.Machine
	link *os.File
}

// startMachine starts QEMU with the command line of a sandbox without disks and
// mounts.
func (b *bench) startMachine(ctx context.Context, k vmm.Kernel) (*guest, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	if err := unix.SetNonblock(fds[0], true); err != nil {
		return nil, err
	}
	link, theirs := os.NewFile(uintptr(fds[0]), "agent link"), os.NewFile(uintptr(fds[1]), "agent link")
	defer theirs.Close()
	console, err := os.Create(filepath.Join(string(b.h), "console.log"))
	if err != nil {
		return nil, errors.Join(err, link.Close())
	}
	defer console.Close()
	m, err := qemu.New(vmm.Config{
		ID: "bench", CPUs: sandbox.DefaultCPUs, MemoryMiB: sandbox.DefaultMemoryMiB, Accel: vmm.Accel(b.o.accel),
		Kernel: k, Agent: theirs, Console: console, Stderr: console,
	}, qemu.Options{Runtime: b.h.Kernels()})
	if err == nil {
		err = m.Start(ctx)
	}
	if err != nil {
		return nil, errors.Join(err, link.Close())
	}
	_ = link.SetDeadline(time.Now().Add(patience))
	return &guest{Machine: m, link: link}, nil
}

// end kills a machine that has not ended.
func (m *guest) end() {
	m.Kill()
	<-m.Done()
	m.link.Close()
}

// off waits for the machine to be gone; it was told to power off.
func (m *guest) off() error {
	m.Stopping()
	select {
	case <-m.Done():
	case <-time.After(patience):
		return errors.New("guest did not power off")
	}
	if e := m.Exit(); e.Reason != "guest-shutdown" {
		return fmt.Errorf("guest ended by %q: %s", e.Reason, e.Detail)
	}
	return nil
}

// bootBare is the floor.
func (b *bench) bootBare(ctx context.Context, k *guestKernel) (s sample, err error) {
	t := stopwatch()
	m, err := b.startMachine(ctx, k.floor)
	if err != nil {
		return s, err
	}
	defer m.end()
	s.QEMU = t()
	if err := m.order(0, 'R'); err != nil {
		return s, err
	}
	s.Guest = t()
	if err := m.order('x', 'd'); err != nil {
		return s, err
	}
	s.Exec = t()
	s.Memory = memoryOf(m.PID())
	t()
	if _, err := m.link.Write([]byte{'q'}); err != nil {
		return s, err
	}
	err = m.off()
	s.Stop = t()
	return s, err
}

// order sends a letter to the bare init, unless it is 0, and waits for its answer.
func (m *guest) order(letter, answer byte) error {
	if letter != 0 {
		if _, err := m.link.Write([]byte{letter}); err != nil {
			return err
		}
	}
	var b [1]byte
	if _, err := io.ReadFull(m.link, b[:]); err != nil {
		return fmt.Errorf("bare init: %w", err)
	}
	if b[0] != answer {
		return fmt.Errorf("bare init said %q, want %q", b[0], answer)
	}
	return nil
}

// bootAgent is the guest's side of a sandbox alone: the same QEMU with our
// agent, driven by this program.
func (b *bench) bootAgent(ctx context.Context, k *guestKernel) (s sample, err error) {
	t := stopwatch()
	m, err := b.startMachine(ctx, k.agent)
	if err != nil {
		return s, err
	}
	defer m.end()
	s.QEMU = t()
	l := &agentLink{out: m.link, in: agentproto.NewReader(m.link, agentproto.MaxLinkFrame)}
	if _, err := l.until(agentproto.MsgHello); err != nil {
		return s, err
	}
	s.Guest = t()
	boot := agentproto.Boot{Hostname: "bench", TimeNS: time.Now().UnixNano(), Entropy: make([]byte, 64)}
	if err := l.ask(0, 0, agentproto.MsgBoot, boot, agentproto.MsgReady); err != nil {
		return s, err
	}
	s.Setup = t()
	nothing := false
	run := agentproto.Exec{Cmd: truePath, Stdin: &nothing}
	if err := l.ask(1, agentproto.FlagSessionStart, agentproto.MsgExec, run, agentproto.MsgExited); err != nil {
		return s, err
	}
	s.Exec = t()
	s.Memory = memoryOf(m.PID())
	t()
	if err := l.ask(0, 0, agentproto.MsgShutdown, agentproto.Shutdown{}, agentproto.MsgGoodbye); err != nil {
		return s, err
	}
	err = m.off()
	s.Stop = t()
	return s, err
}

// agentLink speaks with an agent as its supervisor would.
type agentLink struct {
	out io.Writer
	in  *agentproto.Reader
}

// ask sends one message and waits for one type of answer.
func (l *agentLink) ask(id uint32, flags uint8, msgType string, payload any, want string) error {
	body, err := agentproto.Encode(msgType, payload)
	if err != nil {
		return err
	}
	if err := agentproto.WriteFrame(l.out, agentproto.Frame{ID: id, Flags: flags, Body: body}); err != nil {
		return err
	}
	_, err = l.until(want)
	return err
}

// until reads frames up to one of the type.
func (l *agentLink) until(want string) ([]byte, error) {
	for {
		f, err := l.in.ReadFrame()
		if err != nil {
			return nil, fmt.Errorf("wait for %s: %w", want, err)
		}
		got, _, payload, err := agentproto.Decode(f.Body)
		if err != nil {
			return nil, err
		}
		switch got {
		case want:
			return payload, nil
		case agentproto.MsgBootFailed, agentproto.MsgExecFailed, agentproto.MsgError:
			return nil, fmt.Errorf("agent said %s: %q", got, payload)
		}
	}
}

// stopwatch returns a function that returns the time since its last call.
func stopwatch() func() time.Duration {
	last := time.Now()
	return func() time.Duration {
		now := time.Now()
		d := now.Sub(last)
		last = now
		return d
	}
}
