#!/usr/bin/env bash
# Runs p2pmodel. In a swarm of containers that share the folder /swarm:
#   SWARM_ROLE=bootstrap   writes the address that others join by to /swarm/address
#   SWARM_ROLE=member      waits for it, and joins by it
#   SWARM_ROLE=maintainer  as member; its key, made here, is the maintainer's: the bootstrap waits for it
set -euo pipefail

folder=${SWARM_FOLDER:-/swarm}
patience=${SWARM_PATIENCE:-300}

wait_for() {
    for ((second = 0; second < patience; second++)); do
        if [ -s "$1" ]; then return; fi
        sleep 1
    done
    echo "entrypoint: $1 has not come within $patience seconds" >&2
    exit 1
}

publish() {
    printf '%s\n' "$2" > "$folder/$1.new"
    mv "$folder/$1.new" "$folder/$1"
}

peer_id() {
    p2pmodel id show --json | python -c 'import json, sys; print(json.load(sys.stdin)["peer"])'
}

case ${SWARM_ROLE:-} in
    "") exec p2pmodel "$@" ;;
    bootstrap)
        rm -f "$folder/address"
        wait_for "$folder/maintainer"
        if [ ! -e "$P2PMODEL_HOME/founded" ]; then
            p2pmodel model create starter --name starter --maintainer "$(cat "$folder/maintainer")" --min-patches 2
            touch "$P2PMODEL_HOME/founded"
        fi
        # The line is read as it comes; the node stays this container's first process, and gets its signals.
        exec p2pmodel "$@" --model starter > >(while read -r line; do
            echo "$line"
            case $line in
                "to join this swarm: "*/127.0.0.1/*) ;;
                "to join this swarm: "*) if [ ! -s "$folder/address" ]; then publish address "${line##*--peers }"; fi ;;
            esac
        done)
        ;;
    member | maintainer)
        if [ "$SWARM_ROLE" = maintainer ]; then publish maintainer "$(peer_id)"; fi
        wait_for "$folder/address"
        exec p2pmodel "$@" --peers "$(cat "$folder/address")"
        ;;
    *)
        echo "entrypoint: there is no role $SWARM_ROLE" >&2
        exit 2
        ;;
esac
