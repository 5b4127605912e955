package confine

import (
	"errors"
	"os"
	"os/exec"
)

// Launch is a confined program about to be started.
type Launch struct {
	// Cmd is what to start. Its Stdin, Stdout and Stderr are free to be set;
	// its environment, ExtraFiles and SysProcAttr are not.
	Cmd *exec.Cmd
	// PrivateRoot tells whether the program will see the targets of the binds
	// (true) or the host's paths (false).
	PrivateRoot bool
	// ProcSelfFd is the descriptor number of /proc/self/fd in the program, if
	// the profile asked for it.
	ProcSelfFd int
}

// Prepare makes the command that starts argv confined as p says. files become
// descriptors 3 and up of the program.
func Prepare(msb string, p Profile, argv []string, files []*os.File) (*Launch, error) {
	return nil, errors.ErrUnsupported
}

// Outcome returns what could not be applied.
func (l *Launch) Outcome() ([]Finding, error) { return nil, errors.ErrUnsupported }

// Close frees what belongs to the launch in this process. The program is not affected.
func (l *Launch) Close() {}

// Command is Prepare for callers that do not ask for the outcome.
func Command(msb string, p Profile, argv []string, files []*os.File) (*exec.Cmd, error) {
	l, err := Prepare(msb, p, argv, files)
	if err != nil {
		return nil, err
	}
	return l.Cmd, nil
}

// Main is the entry of the hidden command msb confine-exec.
func Main(args []string) int { return 125 }

// Report says, for each measure, whether this host allows it.
func Report() []Finding { return nil }
