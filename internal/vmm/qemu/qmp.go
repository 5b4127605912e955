package qemu

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
)

// maxQMPLine bounds one message of QEMU in bytes.
const maxQMPLine = 1 << 20

// qmpMessage is one line of the QEMU Machine Protocol.
type qmpMessage struct {
	QMP   json.RawMessage `json:"QMP"`
	Event string          `json:"event"`
	Data  struct {
		Reason  string `json:"reason"`
		Guest   bool   `json:"guest"`
		Action  string `json:"action"`
		NoSpace bool   `json:"nospace"` // of BLOCK_IO_ERROR
	} `json:"data"`
	Return json.RawMessage `json:"return"`
	Error  *struct {
		Class string `json:"class"`
		Desc  string `json:"desc"`
	} `json:"error"`
}

// qmp is a connection that only listens once it has been set up.
type qmp struct {
	f  *os.File
	in *bufio.Reader
}

func newQMP(f *os.File) *qmp { return &qmp{f: f, in: bufio.NewReader(f)} }

// greet waits for the greeting, leaves negotiation mode and waits for the answer.
// QEMU greets before it has made its devices and answers after: only the answer
// means that it runs.
func (q *qmp) greet(event func(*qmpMessage)) error {
	m, err := q.next()
	if err != nil {
		return err
	}
	if m.QMP == nil {
		return errors.New("QEMU did not greet")
	}
	if err := q.command("qmp_capabilities"); err != nil {
		return err
	}
	for {
		m, err := q.next()
		switch {
		case err != nil:
			return err
		case m.Error != nil:
			return errors.New("QMP: " + m.Error.Desc)
		case m.Return != nil:
			return nil
		}
		event(m)
	}
}

// command sends a command without arguments; its answer comes as a message.
func (q *qmp) command(name string) error {
	_, err := fmt.Fprintf(q.f, "{\"execute\":%q}\n", name)
	return err
}

// next returns the next message.
func (q *qmp) next() (*qmpMessage, error) {
	var line []byte
	for {
		part, err := q.in.ReadSlice('\n')
		line = append(line, part...)
		if len(line) > maxQMPLine {
			return nil, errors.New("QMP message too long")
		}
		if errors.Is(err, bufio.ErrBufferFull) {
			continue
		}
		if err != nil {
			if err == io.EOF && len(line) > 0 {
				err = io.ErrUnexpectedEOF
			}
			return nil, err
		}
		break
	}
	m := &qmpMessage{}
	if err := json.Unmarshal(line, m); err != nil {
		return nil, fmt.Errorf("QMP message: %w", err)
	}
	return m, nil
}
