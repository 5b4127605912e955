package supervisor

import (
	"errors"
	"os/exec"
	"strings"
	"syscall"
)

// wait returns how the sandbox ended: the status to record, and its cause where
// nobody asked for the end.
func (s *supervisor) wait(lifeline, signalled <-chan struct{}) (status, cause string) {
	select {
	case r := <-s.stop:
		s.stopGuest(r)
		return StatusStopped, ""
	case <-lifeline:
		s.stopGuest(stopRequest{why: creatorGone, grace: lifelineGrace})
		return StatusStopped, creatorGone
	case <-signalled:
		s.stopGuest(stopRequest{why: endedBySignal, grace: lifelineGrace})
		return StatusStopped, endedBySignal
	case <-s.filesDone():
	case <-s.machine.Done():
	case <-s.relay.done:
	}
	if cause = s.crashCause(); cause != "" {
		return StatusCrashed, cause
	}
	return StatusStopped, "" // the guest powered itself off
}

// Causes of a stop that no request asked for.
const (
	creatorGone   = "creator gone"
	endedBySignal = "supervisor ended by a signal"
)

// crashCause names what ended first. The end of one of them soon ends others: a
// file server ends with its VMM, the link ends with either; so a machine that is
// found dead within the grace was the first, unless a signal killed the file
// server, which no VMM does.
func (s *supervisor) crashCause() string {
	if killedBySignal(s.filesErr()) {
		return "file server gone" + suffix(s.filesErr())
	}
	grace := lifelineGrace
	if s.saidGoodbye() {
		grace = goodbyeGrace
	}
	if s.machineEnds(grace) {
		return s.machineEnd()
	}
	select {
	case <-s.filesDone():
		return "file server gone" + suffix(s.filesErr())
	default:
	}
	if s.saidGoodbye() {
		return "guest did not power off after its agent's goodbye"
	}
	return "guest agent gone" + suffix(s.relay.endedBy())
}

// machineEnd names the end of a machine nobody asked to stop. The text of the
// guest's console in it is untrusted.
func (s *supervisor) machineEnd() string {
	e := s.machine.Exit()
	detail := printableText([]byte(firstLine(e.Detail)))
	switch {
	case e.Reason == "guest-shutdown" && s.saidGoodbye():
		return ""
	case e.Reason == "guest-shutdown":
		return "guest powered off without its agent's goodbye"
	case strings.Contains(detail, "Attempted to kill init"): // PID 1 is the agent
		return "guest agent gone: " + detail
	case e.Reason == "guest-reset" || e.Reason == "guest-panic":
		return "guest kernel panic: " + detail
	case detail != "":
		return "vmm gone: " + detail
	}
	return "vmm gone: " + e.Status
}

// filesErr says how the file server ended; nil while it runs.
func (s *supervisor) filesErr() error {
	select {
	case <-s.filesDone():
		return s.files.Err()
	default:
		return nil
	}
}

// killedBySignal reports whether a process ended by a signal.
func killedBySignal(err error) bool {
	var exit *exec.ExitError
	if !errors.As(err, &exit) {
		return false
	}
	ws, ok := exit.Sys().(syscall.WaitStatus)
	return ok && ws.Signaled()
}

func (s *supervisor) saidGoodbye() bool {
	select {
	case <-s.relay.goodbye:
		return true
	default:
		return false
	}
}
