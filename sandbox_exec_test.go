package microsandbox_test

import (
	"errors"

	msb "github.com/microsandbox-go/microsandbox"
)

// failure is the cause of an error of kind ErrExecFailed, nil if it has none.
func failure(err error) *msb.ExecFailure {
	var f *msb.ExecFailure
	errors.As(err, &f)
	return f
}
