package server

import (
	"time"

	"google.golang.org/protobuf/proto"

	ententev1 "github.com/entente-mesh/entente/api/entente/v1"
)

// Take is what a chunk of the member's stream is handed to.
func (h *Hearsay) Take(chunk *ententev1.PresenceResponse) error {
	_, err := h.take(time.Now(), chunk)
	return err
}

// Held is how many bytes of the member's messages and proofs are kept.
func (h *Hearsay) Held() (bytes int) {
	for _, kept := range []map[string]*statement{h.said, h.aside} {
		for _, said := range kept {
			bytes += proto.Size(said.session)
			for _, row := range said.rows {
				bytes += proto.Size(row)
			}
		}
	}
	for _, verified := range h.verified {
		bytes += len(verified.proof.PublicKey) + len(verified.proof.Signature)
	}
	return bytes
}
