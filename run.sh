#!/bin/sh
# Sends the requests of a JSONL file to an LLM API in parallel and leaves one result line for each.  Start: sh run.sh
# As it stands it costs nothing: a stand-in on this machine answers 200 example requests. To send your own requests to a
# real provider, edit the settings down to "nothing to edit below". They are NAME='value', without spaces around the =.
set -eu
trap 'echo "run.sh: the shell cannot read a setting. Write NAME='\''value'\'' without spaces around the =" >&2' EXIT

# ==== settings ========================================================================================================
request_url='https://api.openai.com/v1/chat/completions'
api_key=''                        # better: a line OPENAI_API_KEY=sk-... in a file named .env, which git never stores
api_key_env='OPENAI_API_KEY'      # the NAME of the key in .env
requests_filepath='requests/example_200_chat.jsonl'
save_filepath=''                  # '' = results/<name of the request file>_results.jsonl
max_requests_per_minute=1500      # the limits of your account; 0 = find out
max_tokens_per_minute=125000
seconds_to_sleep_each_loop=0      # shortest time between two requests, for providers with limits per second
max_concurrent_requests=0         # in flight at once; 0 = as many as useful
more_flags=''                     # others, such as '--max_attempts 3 --save_details'; sh run.sh --help lists them

# ==== providers =======================================================================================================
# Delete the # before the settings of ONE provider; they replace those above. Limits are cautious: raise them to yours.

# OpenAI, chat
#requests_filepath='requests/openai_chat.jsonl'
#max_requests_per_minute=500
#max_tokens_per_minute=200000

# OpenAI, embeddings
#request_url='https://api.openai.com/v1/embeddings'
#requests_filepath='requests/openai_embeddings.jsonl'
#max_requests_per_minute=3000
#max_tokens_per_minute=1000000

# OpenAI, responses
#request_url='https://api.openai.com/v1/responses'
#requests_filepath='requests/openai_responses.jsonl'
#max_requests_per_minute=500
#max_tokens_per_minute=200000

# OpenAI, completions
#request_url='https://api.openai.com/v1/completions'
#requests_filepath='requests/openai_completions.jsonl'
#max_requests_per_minute=500
#max_tokens_per_minute=90000

# Aliyun Qwen, native text generation (limits hold per second too: a sixtieth of the minute's; abroad: dashscope-intl)
#request_url='https://dashscope.aliyuncs.com/api/v1/services/aigc/text-generation/generation'
#api_key_env='DASHSCOPE_API_KEY'
#requests_filepath='requests/qwen_native.jsonl'
#max_requests_per_minute=600
#max_tokens_per_minute=1000000
#seconds_to_sleep_each_loop=0.1

# Aliyun Qwen, compatible mode
#request_url='https://dashscope.aliyuncs.com/compatible-mode/v1/chat/completions'
#api_key_env='DASHSCOPE_API_KEY'
#requests_filepath='requests/qwen_compatible.jsonl'
#max_requests_per_minute=600
#max_tokens_per_minute=1000000
#seconds_to_sleep_each_loop=0.1

# DeepInfra, native (the URL names the model, the prompt carries its chat template; 200 in flight per model)
#request_url='https://api.deepinfra.com/v1/inference/meta-llama/Meta-Llama-3-8B-Instruct'
#api_key_env='DEEPINFRA_TOKEN'
#requests_filepath='requests/deepinfra.jsonl'
#max_requests_per_minute=0
#max_tokens_per_minute=0
#max_concurrent_requests=200

# DeepInfra, compatible
#request_url='https://api.deepinfra.com/v1/openai/chat/completions'
#api_key_env='DEEPINFRA_TOKEN'
#requests_filepath='requests/deepinfra_compatible.jsonl'
#max_requests_per_minute=0
#max_tokens_per_minute=0
#max_concurrent_requests=200

# DeepSeek (limits what is in flight, not what is sent in a minute)
#request_url='https://api.deepseek.com/chat/completions'
#api_key_env='DEEPSEEK_API_KEY'
#requests_filepath='requests/deepseek.jsonl'
#max_requests_per_minute=0
#max_tokens_per_minute=0
#max_concurrent_requests=500

# Azure OpenAI (your resource in the URL, the name of your deployment as "model")
#request_url='https://YOUR-RESOURCE.openai.azure.com/openai/v1/chat/completions'
#api_key_env='AZURE_OPENAI_API_KEY'
#requests_filepath='requests/openai_chat.jsonl'
#max_requests_per_minute=300

# Moonshot / Kimi (abroad: api.moonshot.ai, with other keys)
#request_url='https://api.moonshot.cn/v1/chat/completions'
#api_key_env='MOONSHOT_API_KEY'
#requests_filepath='requests/moonshot.jsonl'
#max_requests_per_minute=200
#max_concurrent_requests=50

# Doubao / Volcengine Ark ("model" is the id of your endpoint or of a model)
#request_url='https://ark.cn-beijing.volces.com/api/v3/chat/completions'
#api_key_env='ARK_API_KEY'
#requests_filepath='requests/ark.jsonl'

# ZhipuAI (limits what is in flight per model)
#request_url='https://open.bigmodel.cn/api/paas/v4/chat/completions'
#api_key_env='ZHIPUAI_API_KEY'
#requests_filepath='requests/zhipu.jsonl'
#max_requests_per_minute=0
#max_tokens_per_minute=0

# Mistral (limits per second)
#request_url='https://api.mistral.ai/v1/chat/completions'
#api_key_env='MISTRAL_API_KEY'
#requests_filepath='requests/mistral.jsonl'
#max_requests_per_minute=60
#seconds_to_sleep_each_loop=1

# Google Gemini, native (the URL names the model)
#request_url='https://generativelanguage.googleapis.com/v1beta/models/gemini-flash-latest:generateContent'
#api_key_env='GEMINI_API_KEY'
#requests_filepath='requests/gemini.jsonl'
#max_requests_per_minute=10

# Google Vertex (the key is a token that lives an hour: gcloud auth print-access-token)
#request_url='https://aiplatform.googleapis.com/v1/projects/YOUR-PROJECT/locations/global/publishers/google/models/gemini-2.5-flash:generateContent'
#api_key_env='VERTEX_ACCESS_TOKEN'
#requests_filepath='requests/gemini.jsonl'
#max_requests_per_minute=60

# Anthropic
#request_url='https://api.anthropic.com/v1/messages'
#api_key_env='ANTHROPIC_API_KEY'
#requests_filepath='requests/anthropic.jsonl'
#max_requests_per_minute=50
#max_tokens_per_minute=50000

# Baichuan (here and below: write a model of that provider into the request file)
#request_url='https://api.baichuan-ai.com/v1/chat/completions'
#api_key_env='BAICHUAN_API_KEY'
#requests_filepath='requests/openai_chat.jsonl'
#max_requests_per_minute=120

# JieKou
#request_url='https://api.jiekou.ai/openai/v1/chat/completions'
#api_key_env='JIEKOU_API_KEY'
#requests_filepath='requests/openai_chat.jsonl'
#max_requests_per_minute=60

# Infinigence
#request_url='https://cloud.infini-ai.com/maas/v1/chat/completions'
#api_key_env='INFINI_API_KEY'
#requests_filepath='requests/openai_chat.jsonl'
#max_requests_per_minute=12
#max_tokens_per_minute=12000

# SiliconFlow
#request_url='https://api.siliconflow.cn/v1/chat/completions'
#api_key_env='SILICONFLOW_API_KEY'
#requests_filepath='requests/openai_chat.jsonl'
#max_requests_per_minute=1000
#max_tokens_per_minute=50000

# OpenRouter (free models: 20 requests a minute)
#request_url='https://openrouter.ai/api/v1/chat/completions'
#api_key_env='OPENROUTER_API_KEY'
#requests_filepath='requests/openai_chat.jsonl'
#max_requests_per_minute=20

# Together (limits follow your use)
#request_url='https://api.together.xyz/v1/chat/completions'
#api_key_env='TOGETHER_API_KEY'
#requests_filepath='requests/openai_chat.jsonl'
#max_requests_per_minute=0
#max_tokens_per_minute=0

# Groq
#request_url='https://api.groq.com/openai/v1/chat/completions'
#api_key_env='GROQ_API_KEY'
#requests_filepath='requests/openai_chat.jsonl'
#max_requests_per_minute=30
#max_tokens_per_minute=6000

# A server of your own, no key needed (vLLM :8000, SGLang :30000, Ollama :11434, llama.cpp :8080)
#request_url='http://127.0.0.1:8000/v1/chat/completions'
#api_key_env='LOCAL_API_KEY'
#requests_filepath='requests/openai_chat.jsonl'
#max_requests_per_minute=0
#max_tokens_per_minute=0

# A lab's JSON gateway, /gpt or /claude (the key is your user name there; it travels unencrypted)
#request_url='http://YOUR-GATEWAY:8000/gpt'
#api_key_env='GATEWAY_USERNAME'
#requests_filepath='requests/json_gateway.jsonl'
#more_flags='--provider json_gateway --allow_plain_http'

# ==== nothing to edit below ===========================================================================================
trap - EXIT
[ -z "${ZSH_VERSION:-}" ] || emulate sh # zsh would not split $more_flags otherwise
set -f
CDPATH='' cd -- "$(dirname -- "$0")"
venv=${VENV_DIR:-.venv} # set VENV_DIR in the environment to keep the packages elsewhere
stop() { printf 'run.sh: %s\n' "$1" >&2; exit 2; }

# The key: the one above, else the one in .env, whose lines are read and never run. Pasted quotes and blanks go. It is
# exported, since every user of the machine can see arguments, but not the environment.
clean() { LC_ALL=C tr -cd '[:graph:]' | tr -d "\"'"; }
case $api_key_env in
    '' | [0-9]* | *[!A-Za-z0-9_\ ]*) stop "api_key_env is a NAME such as OPENAI_API_KEY; the key itself belongs into .env" ;;
esac
api_key=$(printf %s "$api_key" | clean)
[ -z "$api_key" ] || export "${api_key_env%% *}=$api_key"
for name in $api_key_env; do # several for several endpoints
    line="^[^A-Za-z_#]*\(export[[:space:]]\{1,\}\)\{0,1\}${name}[[:space:]]*="
    found=
    [ ! -f .env ] || found=$(LC_ALL=C sed -n -e 's/[[:space:]]#.*//' -e "s/$line//p" .env | tail -n 1 | clean)
    [ -z "$found" ] || { [ -n "$api_key" ] && [ "$name" = "${api_key_env%% *}" ]; } || export "$name=$found"
    api_key=$api_key$found
done

# The packages: into a virtual environment of their own, once. The stamp is written last, so that an installation which
# was broken off starts again, and holds what the installation depends on, so that a changed one is brought up to date.
find_python() {
    new_enough='sys.version_info < (3, 11) and sys.exit(1)'
    for candidate in python3 python python3.14 python3.13 python3.12 python3.11; do
        "$candidate" -c "import sys, venv, ensurepip; $new_enough" >/dev/null 2>&1 && return
    done
    python3 -c "import sys; $new_enough" >/dev/null 2>&1 &&
        stop "Python comes without its module venv here; on Debian and Ubuntu: sudo apt install python3-venv"
    found=$(python3 -V 2>/dev/null) || found=none
    stop "needs Python 3.11 or newer, found $found; get it from https://www.python.org/downloads"
}
set_python() {
    python=$venv/bin/python
    [ ! -f "$venv/Scripts/python.exe" ] || python=$venv/Scripts/python.exe # Windows
}
stamp() { "$python" -V 2>&1 && cat pyproject.toml; }
pip() { "$python" -m pip --disable-pip-version-check install --quiet "$@" >>"$venv/install.log" 2>&1 </dev/null; }
install() {
    printf 'installing aiohttp, tiktoken and their helpers into %s: once, takes about 20 s\n' "$venv"
    if ! [ -f "$venv/stamp" ] || ! "$python" -m pip -V >/dev/null 2>&1; then
        find_python
        "$candidate" -m venv --clear "$venv" ||
            stop "could not make $venv here, for the reason above; to keep the packages elsewhere: VENV_DIR=<a folder> sh run.sh"
        set_python
    fi
    "$python" - "$venv" <<'END'
import pathlib, sys, tomllib
project = tomllib.loads(pathlib.Path("pyproject.toml").read_text("utf-8"))["project"]
for name, packages in ("required", project["dependencies"]), ("optional", project["optional-dependencies"]["full"]):
    pathlib.Path(sys.argv[1], name).write_bytes("".join(f"{package}\n" for package in packages).encode())
END
    export PIP_USER=0
    if ! pip --only-binary :all: -r "$venv/required" -r "$venv/optional"; then
        pip --prefer-binary -r "$venv/required" ||
            stop "could not install aiohttp and tiktoken; the reason ends $venv/install.log. Where PyPI is slow or blocked, a mirror near you helps:
PIP_INDEX_URL=<the address of the mirror> sh run.sh"
        while read -r package; do
            pip --only-binary :all: "$package" ||
                printf 'goes on without %s, which cannot be installed here\n' "${package%%[<>=; ]*}"
        done <"$venv/optional"
    fi
    stamp >"$venv/stamp"
}
set_python
[ "$(stamp 2>&1)" = "$(cat "$venv/stamp" 2>&1)" ] || install

# Untouched: a stand-in answers, even if the environment holds a key, and into a result file of its own, so that nobody
# takes its answers for real ones. It ends when the program does: exec below makes that its parent.
if [ -z "$api_key" ] && [ "$request_url" = 'https://api.openai.com/v1/chat/completions' ]; then
    port=$venv/port.$$
    rm -f "$port"
    "$python" tests/local_provider.py --port 0 --port_file "$port" --latency 0.3 --latency_spread 0.5 \
        --exit_with_parent >/dev/null &
    until [ -s "$port" ]; do kill -0 $! 2>/dev/null || stop "the local stand-in did not start"; sleep 0.1; done
    request_url=http://127.0.0.1:$(cat "$port")/v1/chat/completions
    rm -f "$port"
    requests_filepath=requests/example_200_chat.jsonl
    save_filepath=results/answers_of_the_local_stand_in.jsonl
    export "${api_key_env%% *}=local-stand-in"
    cat <<END
No key in run.sh or .env: a local stand-in makes up the answers. Nothing leaves this machine, nothing is charged.
To go live, write $api_key_env=<your key> into a file named .env here, and set request_url, api_key_env and
requests_filepath at the top of run.sh, or delete the # before the lines of your provider there.

END
fi

name=${requests_filepath##*/}
# shellcheck disable=SC2086 # the flags are words
exec "$python" api_request_parallel_processor.py --request_url "$request_url" --api_key_env "$api_key_env" \
    --requests_filepath "$requests_filepath" --save_filepath "${save_filepath:-results/${name%.jsonl}_results.jsonl}" \
    --max_requests_per_minute "$max_requests_per_minute" --max_tokens_per_minute "$max_tokens_per_minute" \
    --seconds_to_sleep_each_loop "$seconds_to_sleep_each_loop" --max_concurrent_requests "$max_concurrent_requests" \
    $more_flags "$@"
