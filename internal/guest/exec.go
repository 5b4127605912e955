package guest

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"sync"
	"syscall"

	"github.com/fxamacker/cbor/v2"
	"golang.org/x/sys/unix"

	"github.com/microsandbox-go/microsandbox/internal/agentproto"
)

// execSession is one running program.
type execSession struct {
	a   *agent
	id  uint32
	out *agentproto.Stream

	stdout, stderr *outPipe
	stdin          *inPipe // nil: /dev/null
	done           <-chan unix.WaitStatus

	mu    sync.Mutex
	pid   int         // guarded by mu; 0 until the program runs
	early unix.Signal // guarded by mu: asked for before the program ran
}

// startExec starts a program and answers Started or ExecFailed.
func (a *agent) startExec(id uint32, p []byte) {
	_ = pointCrash.Hit()
	var x agentproto.Exec
	if err := agentproto.Unmarshal(p, &x); err != nil {
		a.refuse(id, "invalid_payload", err.Error(), agentproto.MsgExec)
		return
	}
	e := &execSession{a: a, id: id}
	if x.Stdin == nil || *x.Stdin {
		e.stdin = newInPipe() // input may arrive before the program runs
	}
	if !a.sessions.add(id, e) {
		a.refuse(id, "invalid_session", "id is in use", agentproto.MsgExec)
		return
	}
	e.out = a.link.Open(id)
	go e.serve(&x)
}

// serve runs the program from start to exit. It has a goroutine of its own: to
// find the program it reads file systems, which may take its time.
func (e *execSession) serve(x *agentproto.Exec) {
	if err := e.start(x); err != nil {
		e.a.sessions.drop(e.id, e)
		failed := agentproto.ExecFailed{Kind: errnoKind(err), Message: err.Error()}
		var xe *execError
		if errors.As(err, &xe) {
			failed = xe.failed()
		}
		finish(e.out, agentproto.MsgExecFailed, failed)
		return
	}
	tell(e.out, agentproto.MsgStarted, agentproto.Started{PID: uint32(e.pid)})
	e.run()
}

// start resolves and starts the program. After an error nothing is left open.
func (e *execSession) start(x *agentproto.Exec) error {
	if x.TTY {
		return &execError{kindPty, "terminals are not supported yet", nil}
	}
	if err := checkRlimits(x.Rlimits); err != nil {
		return err
	}
	prog, err := e.a.resolve(x)
	if err != nil {
		return err
	}
	var ends pipeEnds
	defer ends.closeChild()
	stdin := e.a.devNull
	if e.stdin != nil {
		if stdin, e.stdin.f, err = ends.newPipe(1); err != nil {
			return ends.fail(err)
		}
	}
	stdout, out, err := ends.output()
	if err != nil {
		return ends.fail(err)
	}
	stderr, errOut, err := ends.output()
	if err != nil {
		return ends.fail(err)
	}
	e.stdout, e.stderr = out, errOut
	pid, done, err := e.a.procs.start(func() (int, error) { return prog.fork(stdin, stdout, stderr) })
	if err != nil {
		return ends.fail(err)
	}
	e.done = done
	e.mu.Lock()
	defer e.mu.Unlock()
	e.pid = pid
	if e.early != 0 {
		e.a.procs.signalGroup(pid, e.early)
	}
	return nil
}

// signal signals the program's group, now or as soon as it runs.
func (e *execSession) signal(sig unix.Signal) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.pid == 0 {
		e.early = sig
		return
	}
	e.a.procs.signalGroup(e.pid, sig)
	e.a.waits.soon()
}

// fork starts the program in a session, and so a process group, of its own.
func (p *program) fork(stdin, stdout, stderr int) (int, error) {
	if len(p.rlimits) > 0 {
		return p.forkShim(stdin, stdout, stderr)
	}
	attr := &syscall.ProcAttr{
		Dir:   p.dir,
		Env:   p.env,
		Files: []uintptr{uintptr(stdin), uintptr(stdout), uintptr(stderr)},
		Sys: &syscall.SysProcAttr{
			Setsid:     true,
			Credential: &syscall.Credential{Uid: p.acc.uid, Gid: p.acc.gid, Groups: p.acc.groups},
		},
	}
	pid, err := syscall.ForkExec(p.file, p.argv, attr)
	if err != nil {
		return 0, p.startError(err)
	}
	return pid, nil
}

// startError explains why a file that exists did not become a program.
func (p *program) startError(err error) error {
	kind, msg := errnoKind(err), fmt.Sprintf("%s: %v", p.file, errnoText(err))
	switch kind {
	case kindNotFound:
		msg = fmt.Sprintf("%s: its interpreter or loader does not exist", p.file)
	case kindNotExec:
		msg = fmt.Sprintf("%s: not a program for this machine, and no #! line", p.file)
	}
	return &execError{kind, msg, err}
}

// agentBinary is the agent's own program, whatever the root is now.
const agentBinary = "/proc/1/exe"

// forkShim starts the program through the shim, which sets its limits.
func (p *program) forkShim(stdin, stdout, stderr int) (int, error) {
	order, err := cbor.Marshal(shimOrder{
		File: p.file, Argv: p.argv, Env: p.env, Dir: p.dir,
		UID: p.acc.uid, GID: p.acc.gid, Groups: p.acc.groups, Rlimits: p.rlimits,
	})
	if err != nil {
		return 0, err
	}
	orderFD, err := memfile("msb-exec", order)
	if err != nil {
		return 0, err
	}
	defer unix.Close(orderFD)
	var report [2]int
	if err := unix.Pipe2(report[:], unix.O_CLOEXEC); err != nil {
		return 0, err
	}
	defer unix.Close(report[0])
	attr := &syscall.ProcAttr{
		Env:   []string{"GOMAXPROCS=1"},
		Files: []uintptr{uintptr(stdin), uintptr(stdout), uintptr(stderr), uintptr(orderFD), uintptr(report[1])},
		Sys:   &syscall.SysProcAttr{Setsid: true},
	}
	pid, err := syscall.ForkExec(agentBinary, []string{"msb-agent", shimArg}, attr)
	unix.Close(report[1])
	if err != nil {
		return 0, err
	}
	var b [8]byte
	if n, _ := unix.Read(report[0], b[:]); n != len(b) {
		return pid, nil // closed by execve: the program runs
	}
	_, _ = unix.Wait4(pid, nil, 0, nil)
	errno := unix.Errno(binary.LittleEndian.Uint32(b[4:]))
	switch binary.LittleEndian.Uint32(b[:]) {
	case stageRlimit:
		return 0, &execError{kindRlimit, fmt.Sprintf("resource limits: %v", errno), errno}
	case stageUser:
		return 0, &execError{kindUser, fmt.Sprintf("user %d: %v", p.acc.uid, errno), errno}
	case stageDir:
		return 0, &execError{kindBadCwd, fmt.Sprintf("working directory %s: %v", p.dir, errno), errno}
	}
	return 0, p.startError(errno)
}

// memfile returns a descriptor from which data can be read.
func memfile(name string, data []byte) (int, error) {
	fd, err := unix.MemfdCreate(name, unix.MFD_CLOEXEC)
	if err != nil {
		return -1, err
	}
	for len(data) > 0 {
		n, err := unix.Write(fd, data)
		if err != nil {
			unix.Close(fd)
			return -1, err
		}
		data = data[n:]
	}
	if _, err := unix.Seek(fd, 0, io.SeekStart); err != nil {
		unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

// run pumps the program's output until it has ended, then reports its exit
// behind all of that output. What processes it leaves behind still write is
// read and thrown away, so that they do not die of SIGPIPE.
func (e *execSession) run() {
	var pumps sync.WaitGroup
	for typ, out := range map[string]*outPipe{agentproto.MsgStdout: e.stdout, agentproto.MsgStderr: e.stderr} {
		pumps.Go(func() { out.pump(func(p []byte) error { return e.out.Data(typ, p) }) })
	}
	if e.stdin != nil {
		go e.stdin.pump(e)
	}
	st := <-e.done
	e.stdout.programEnded()
	e.stderr.programEnded()
	pumps.Wait()
	if e.stdin != nil {
		e.stdin.close()
	}
	e.a.sessions.drop(e.id, e)
	finish(e.out, agentproto.MsgExited, agentproto.Exited{Code: exitCode(st)})
}

func (e *execSession) frame(typ string, p []byte, bodyLen int) {
	switch typ {
	case agentproto.MsgStdin:
		data, err := agentproto.DecodeData(p)
		if err != nil || e.stdin == nil {
			return
		}
		e.stdin.push(data, bodyLen)
	case agentproto.MsgSignal:
		var s agentproto.Signal
		if agentproto.Unmarshal(p, &s) == nil && s.Signal > 0 && s.Signal <= 64 {
			e.signal(unix.Signal(s.Signal))
		}
	}
}

// abandon kills the program's group; run then ends as usual.
func (e *execSession) abandon() { e.signal(unix.SIGKILL) }
