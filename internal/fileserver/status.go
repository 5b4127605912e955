package fileserver

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/microsandbox-go/microsandbox/internal/errdefs"
)

// request is what a file server is started for.
type request struct {
	ID          string  `json:"id"`
	Shares      []Share `json:"shares"`
	PrivateRoot bool    `json:"private_root"`
	Privileged  bool    `json:"privileged"`
	Config      bool    `json:"config"`
	Ledgers     []int   `json:"ledgers"` // descriptors, one for each share; 0: none
	ProcSelfFd  int     `json:"proc_self_fd"`
}

// status is the one message of a file server to its starter: it serves, or
// why it does not.
type status struct {
	Ready bool         `json:"ready"`
	Kind  errdefs.Kind `json:"kind,omitempty"`
	Msg   string       `json:"msg,omitempty"`
	Hint  string       `json:"hint,omitempty"`
}

// maxStatus bounds what is read of a process that a guest cannot yet have
// reached, but that has opened a stranger's directory.
const maxStatus = 64 << 10

func readStatus(r io.Reader) (status, error) {
	var s status
	b, err := io.ReadAll(io.LimitReader(r, maxStatus))
	if err != nil {
		return s, err
	}
	if len(b) == 0 {
		return s, errors.New("no word from it")
	}
	if err := json.Unmarshal(b, &s); err != nil {
		return s, fmt.Errorf("its first word: %w", err)
	}
	return s, nil
}

// error returns the child's error as it was there.
func (s status) error() error {
	return &errdefs.Error{Kind: s.Kind, Msg: s.Msg, Hint: s.Hint}
}

// report writes the message and closes the pipe.
func report(w *os.File, failure error) error {
	s := status{Ready: failure == nil}
	if failure != nil {
		s.Kind, s.Msg = errdefs.KindOf(failure), failure.Error()
		var e *errdefs.Error
		if errors.As(failure, &e) {
			s.Hint = e.Hint
		}
	}
	b, err := json.Marshal(s)
	if err == nil {
		_, err = w.Write(b)
	}
	return errors.Join(err, w.Close())
}
