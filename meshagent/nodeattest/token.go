// Package nodeattest is the attesting half of node attestation: what a host
// shows a CA to be admitted as an agent.
package nodeattest
