// Package frontend is the VMM side of the vhost-user protocol.
package frontend
